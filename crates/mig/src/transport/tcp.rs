//! TCP.

use std::net::TcpListener;

use mig_core::{Blame, Fault, Side, Step};

use super::Address;

/// A receiver's ear.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: Address,
}

impl Listener {
    /// Listens. Port 0 takes a free one; see [`Listener::address`].
    ///
    /// # Errors
    /// The name does not resolve, the address is not this host's, or the port is taken.
    pub fn bind(address: &Address) -> Result<Self, Fault> {
        let fault = |e: std::io::Error| {
            Fault::new(
                Side::Destination,
                Step::Connect,
                Blame::Configuration,
                format!("cannot listen on {address}: {e}"),
            )
            .remedy("choose an address of this host and a free port; port 0 takes any")
        };
        let listener = TcpListener::bind((address.host.as_str(), address.port)).map_err(fault)?;
        let local = listener.local_addr().map_err(fault)?;
        Ok(Self { listener, address: Address::tcp(local.ip().to_string(), local.port()) })
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> &Address {
        &self.address
    }
}
