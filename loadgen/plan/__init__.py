"""`prfaas-loadgen plan`: threshold, split, throughput and cost of a deployment, before there is one."""
