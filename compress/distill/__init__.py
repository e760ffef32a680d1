"""A smaller model, the student, is trained to imitate a larger one, the teacher. One file a method."""
