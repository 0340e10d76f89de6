//! Programs of ovnet; see main.rs.
