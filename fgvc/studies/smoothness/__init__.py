"""How smooth the loss is along its gradient."""
