//! Which fault points the source's driver reaches, by what its machine hears and asks for.

use mig_core::Step;
use mig_core::source::{Action, Event};
use mig_wire::Message;

use super::Point;

/// The point of an event that is about to be fed to the machine.
pub(crate) fn heard(event: &Event, step: Step) -> Option<Point> {
    match event {
        Event::Connected => Some(Point::SourceConnected),
        Event::Message(Message::Welcome(_)) => Some(Point::SourceWelcomeHeard),
        Event::Message(Message::Accept(_)) => Some(Point::SourceAcceptHeard),
        Event::Message(Message::RoundAck { .. }) if matches!(step, Step::Round(_)) => {
            Some(Point::SourceRoundAcknowledged)
        }
        Event::Message(Message::Ready { .. }) => Some(Point::SourceReadyHeard),
        Event::Message(Message::Running { .. }) => Some(Point::SourceRunningHeard),
        Event::Message(Message::Gap(_)) => Some(Point::SourceGapHeard),
        Event::Attached => Some(Point::SourceAttached),
        Event::Tracking => Some(Point::SourceTracking),
        Event::RoundSent { .. } if matches!(step, Step::Round(_)) => Some(Point::SourceRoundSent),
        Event::RoundSent { .. } => Some(Point::SourceLastRoundSent),
        Event::Synced { .. } if step == Step::LastSync => Some(Point::SourceLastSync),
        Event::Paused => Some(Point::SourcePaused),
        Event::Saved => Some(Point::SourceSaved),
        Event::Answered(_) => Some(Point::SourceAnswered),
        _ => None,
    }
}

/// The point of an action that is about to be performed.
pub(crate) fn before(action: &Action) -> Option<Point> {
    match action {
        Action::Commit(_) => Some(Point::SourceCommitting),
        Action::Query { .. } => Some(Point::SourceAsking),
        _ => None,
    }
}

/// The point of a message that was handed to the link.
pub(crate) fn sent(message: &Message) -> Option<Point> {
    match message {
        Message::Hello(_) => Some(Point::SourceHelloSent),
        Message::Describe(_) => Some(Point::SourceDescribeSent),
        Message::State { .. } => Some(Point::SourceStateSent),
        Message::Commit => Some(Point::SourceCommitSent),
        _ => None,
    }
}
