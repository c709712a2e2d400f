"What the tests of training share: small tasks, and processes that may be killed."
