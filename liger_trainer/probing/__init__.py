"""What a rule, a match and a skip are; the numeric probe; rebinding of forwards."""
