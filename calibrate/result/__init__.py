"""From loss changes to the scores file: averages, budget, held-out check, tables and figures."""
