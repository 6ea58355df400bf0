"""Discrete events over the same scheduling policies as the live router: engines are profiles, time is virtual."""
