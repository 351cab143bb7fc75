"""What reduction costs and saves on this machine; `restore-ext bench` prints it.

Providers and ways take turns, round by round, so that a machine that slows down slows all of them.
A number is a median with the 20th and the 80th percentile, a ratio one of ratios within a round.
"""
