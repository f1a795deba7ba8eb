"""The tests of hybridpar; `pytest` in the checkout runs them all."""
