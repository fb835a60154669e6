"""Commands of `fastresnet`, one module each: its options, and `run`, which takes the arguments after its name."""
