"""When the transfer risk map helps, by how much, and against whom: scenarios, runs, report."""
