"""From a checkpoint's headers to a plan: recipes, what consumers take, smoothing, and what each tensor becomes."""
