"""The console: one page at the router that shows the cluster, the decisions and what happened to each request."""
