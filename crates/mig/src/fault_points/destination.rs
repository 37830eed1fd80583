//! Which fault points the destination's driver reaches, by what its machine hears and asks for.

use mig_core::destination::{Action, Event};
use mig_core::progress::Progress;
use mig_wire::Message;

use super::Point;

/// The point of an event that is about to be fed to the machine.
pub(crate) fn heard(event: &Event) -> Option<Point> {
    match event {
        Event::Message(Message::Hello(_)) => Some(Point::DestinationHelloHeard),
        Event::Message(Message::Describe(_)) => Some(Point::DestinationDescribeHeard),
        Event::Message(Message::State { .. }) => Some(Point::DestinationStateHeard),
        Event::Message(Message::Commit) => Some(Point::DestinationCommitHeard),
        Event::Prepared(_) => Some(Point::DestinationPrepared),
        Event::Attached => Some(Point::DestinationAttached),
        Event::Loaded => Some(Point::DestinationLoaded),
        Event::Resumed { .. } => Some(Point::DestinationResumed),
        Event::Query => Some(Point::DestinationAsked),
        _ => None,
    }
}

/// The point of an action that is about to be performed.
pub(crate) fn before(action: &Action) -> Option<Point> {
    match action {
        Action::Load(_) => Some(Point::DestinationLoading),
        Action::Resume(_) => Some(Point::DestinationResuming),
        Action::Tell(Progress::InDoubt { .. }) => Some(Point::DestinationInDoubt),
        Action::Answer(_) => Some(Point::DestinationAnswering),
        _ => None,
    }
}

/// The point of a message that was handed to the link.
pub(crate) fn sent(message: &Message) -> Option<Point> {
    match message {
        Message::Welcome(_) => Some(Point::DestinationWelcomeSent),
        Message::Accept(_) => Some(Point::DestinationAcceptSent),
        Message::RoundAck { .. } => Some(Point::DestinationRoundAcknowledged),
        Message::Ready { .. } => Some(Point::DestinationReadySent),
        Message::Running { .. } => Some(Point::DestinationRunningSent),
        Message::Gap(_) => Some(Point::DestinationGapSent),
        _ => None,
    }
}
