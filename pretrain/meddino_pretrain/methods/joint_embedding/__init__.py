"""The baselines that graph matching is compared with: embeddings of views of one image are brought together."""
