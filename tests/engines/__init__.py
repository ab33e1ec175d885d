"""Engines that the conformance suite is held against. Each is served as `--engine=tests.engines.<module>:<class>`."""
