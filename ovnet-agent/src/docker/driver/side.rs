//! What the comparison of Docker's networks with Consul's needs of the driver.
