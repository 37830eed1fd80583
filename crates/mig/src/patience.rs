//! How long a peer that is alive may take for its next word. (One that is not is noticed by its silence.)

use std::time::Duration;

use mig_core::{Blame, Fault, Side, Step};

/// What a source gives the destination, by the source's step; `None` where it depends on how much there is to
/// send.
pub(crate) fn with_destination(step: Step) -> Option<Duration> {
    match step {
        Step::Handshake => Some(Duration::from_secs(10)),
        // it makes the guest's memory: seconds a GiB where its host must find it first
        Step::Describe => Some(Duration::from_secs(600)),
        Step::Load | Step::Verify => Some(Duration::from_secs(60)),
        Step::Commit => Some(Duration::from_secs(30)),
        Step::Connect
        | Step::Prepare
        | Step::Attach
        | Step::Track
        | Step::Round(_)
        | Step::Pause
        | Step::Save
        | Step::LastSync
        | Step::LastRound
        | Step::Resume => None,
    }
}

/// What a destination gives the source, by the destination's step; `None` where it depends on the guest.
pub(crate) fn with_source(step: Step) -> Option<Duration> {
    match step {
        Step::Handshake | Step::Describe | Step::Attach => Some(Duration::from_secs(10)),
        Step::Commit => Some(Duration::from_secs(60)),
        Step::Connect
        | Step::Prepare
        | Step::Track
        | Step::Round(_)
        | Step::Pause
        | Step::Save
        | Step::LastSync
        | Step::LastRound
        | Step::Verify
        | Step::Load
        | Step::Resume => None,
    }
}

/// The fault of a peer that lives but does not go on. Blamed on the peer, not the network: a destination then
/// ends with its promise that the guest never ran there, and not in doubt.
pub(crate) fn too_late(side: Side, step: Step) -> Fault {
    let peer = match side {
        Side::Source => Side::Destination,
        Side::Destination => Side::Source,
    };
    let cause = format!("the {peer} is there but has not gone on in time");
    Fault::new(side, step, Blame::Peer, cause).remedy(format!("see what the {peer} is doing; migrate again"))
}
