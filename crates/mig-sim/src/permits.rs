//! Who may run the guest, counted by the permits that are really spent.

use mig_core::Side;

use crate::verdict::Violation;

/// Who may run the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Source,
    /// The source spent its permit, the destination has not minted one.
    Nobody,
    Destination,
}

/// The account.
#[derive(Debug)]
pub(crate) struct Permits {
    holder: Holder,
}

impl Permits {
    /// The guest starts at the source.
    pub(crate) fn new() -> Self {
        Self { holder: Holder::Source }
    }

    /// The source spends its permit on the destination.
    pub(crate) fn given_away(&mut self) -> Result<(), Violation> {
        if self.holder != Holder::Source {
            return Err(Violation::TwoRunners { side: Side::Source });
        }
        self.holder = Holder::Nobody;
        Ok(())
    }

    /// The source spends a permit on itself.
    pub(crate) fn taken_back(&mut self) -> Result<(), Violation> {
        if self.holder == Holder::Destination {
            return Err(Violation::TwoRunners { side: Side::Source });
        }
        self.holder = Holder::Source;
        Ok(())
    }

    /// The destination spends a permit.
    pub(crate) fn taken_over(&mut self) -> Result<(), Violation> {
        if self.holder != Holder::Nobody {
            return Err(Violation::TwoRunners { side: Side::Destination });
        }
        self.holder = Holder::Destination;
        Ok(())
    }
}
