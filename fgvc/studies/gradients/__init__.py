"""How far published gradients are from the exact one."""
