"""Examples: programs that use greenjobs as yours would; the tests run them."""
