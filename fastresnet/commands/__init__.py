"""Commands of `fastresnet`, a module each: its options, and `run`, which takes the arguments after its name."""
