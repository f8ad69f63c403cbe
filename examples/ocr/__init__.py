"""Reading text: a recognizer, and words with known truth."""
