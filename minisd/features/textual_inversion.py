"""Learned words."""

TABLE = "text_model.embeddings.token_embedding.weight"  # the rows of the tokens, in the state of a TextEncoder
