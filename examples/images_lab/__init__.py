"""What examples/images_study.py is made of: networks, training, results, figures and the page."""
