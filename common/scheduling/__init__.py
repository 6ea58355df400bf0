"""Scheduling policies: pure functions that the live router and the simulator call alike."""
