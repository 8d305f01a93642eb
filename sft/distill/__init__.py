"""Algorithm distillation: a transformer that learns in context as a learning algorithm does."""
