"""The demo: simulated brains, a run for each way to train, and a page that compares them."""
