"""`make gpu`: builds, tests and measures on the GPU of this machine, offline, in stages that each keep what they found."""
