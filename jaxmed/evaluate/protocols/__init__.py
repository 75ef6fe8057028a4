"""Ways to judge an encoder after a run: each fits on one split and scores another."""
