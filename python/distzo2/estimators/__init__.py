"""From the losses of a step's perturbations to the coefficients of its update, and schedules of rates over steps."""
