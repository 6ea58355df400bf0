"""The performance model: curves and profiles of nodes, links, length distributions, and the paper's equations. Pure."""
