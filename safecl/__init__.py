"""safecl: which continual-learning method keeps a fine-tuned model safe, and what it costs in usefulness."""
