"""
The suite held against itself: correct engines, which must come out clean, and broken ones, which must not.

    pytest --engine=conformance.selftest.toy:ToyEngine
"""
