//! What the project's verbs share with its tests.
