"""One module for each command of `fastresnet`: its options, and `run`, which takes the arguments after its name."""
