"""Route analysis: how good a token's standard route is among sampled routes of equal compute."""
