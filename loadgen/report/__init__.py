"""What a run comes to: summary statistics, tables, files, and one page with plots. From records alone, so that a live
run, a simulated one and a saved file are told alike. Pure but for `command.py` and `files.py`, which read and write.
"""
