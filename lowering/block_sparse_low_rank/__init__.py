"""The sum of a block-sparse weight and one of low rank."""
