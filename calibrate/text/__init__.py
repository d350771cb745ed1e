"""What a calibration reads: corpora, questions with answers, and which positions are hard."""
