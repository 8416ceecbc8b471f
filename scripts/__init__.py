"""Scripts of the checkout; no part of the package."""
