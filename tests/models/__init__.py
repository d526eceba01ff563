"""Networks written from their papers, with random weights and sane activations: see ``tests.models.zoo``."""
