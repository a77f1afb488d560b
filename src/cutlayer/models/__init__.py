"""Models: cutting a user's module into pieces, and assembling it back."""
