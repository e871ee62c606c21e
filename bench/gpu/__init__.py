"""`make gpu`: builds, tests and measures on this machine's GPU, offline, in stages that each keep what they found."""
