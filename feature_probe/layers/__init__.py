"""What a layer is: rules, what is measured of a model, what is refused."""
