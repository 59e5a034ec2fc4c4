"""The configs that ship with the library, found by Hydra as a package."""
