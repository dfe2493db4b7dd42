//! What other programs of the host have of it: service managers, shells.
