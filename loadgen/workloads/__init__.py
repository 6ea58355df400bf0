"""What is asked for and when: lengths, prompts, prefixes, conversations, traces and arrivals.

Everything here is a function of its arguments and a seed, so that every system is given the same requests at the same
times. `flags.py` makes a `Workload` of a command line; `schedule.py` says when each of its requests leaves.
"""
