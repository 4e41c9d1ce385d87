"""What a trained model is for: scores, recommendations, a server."""
