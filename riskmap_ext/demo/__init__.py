"""The demo: simulated brains, a run for each loss, and a page that compares them."""
