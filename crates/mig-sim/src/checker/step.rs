//! The steps of the checked world: everything that can happen, and what it is called.

use mig_core::Side;
use mig_core::switchover::Word;

use super::machines::{Machines, MessageId, Work};
use super::state::Token;

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// The head of the control connection arrives.
    Hears(Side, MessageId),
    /// The head of the page channel arrives.
    Arrives(Token),
    /// What a side was asked to do is done, or was not possible.
    Works(Side, Work, Outcome),
    /// A side notices that its control connection is closed or silent.
    Notices(Side),
    /// A side takes its control connection for lost, which it is not (yet).
    Suspects(Side),
    /// A side notices that its page channel is lost.
    NoticesPages(Side),
    /// A side has waited long enough for its peer, which is there.
    TooLate(Side),
    Cancels(Side),
    Crashes(Side),
    /// A direction of the control connection, by whom it led to.
    Cut(Side),
    CutPages,
    /// The source connects to ask.
    Asks,
    /// It cannot, or has waited long enough for an answer.
    Unanswered,
    /// A question arrives: the one that the source waits for, or one that it does not wait for any more.
    QuestionArrives {
        stray: bool,
    },
    AnswerArrives,
    /// The source, which has the guest, asks for the copy it left.
    Recalls,
    /// The arbiter decides on a claim.
    Decides(Side),
    /// Its answer, or the question, is lost.
    ArbiterFails(Side),
    Says(Side, Word),
    /// The destination's listener forgets the session: too many came after it.
    Forgets,
}

/// How work went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    Done,
    Failed,
    /// The dirty log holds too many pages for the pause.
    ManyDirty,
    /// Digests differ.
    Differs,
    /// The guest is refused.
    Refused,
}

/// Steps that need neither a fault nor anybody's will: with these alone everything must end well.
pub(super) const NATURAL: u8 = 0;
/// Those, and the words of an operator.
pub(super) const WITH_WORDS: u8 = 1;

impl Step {
    /// Its class, for what must be reachable; a fault has none.
    pub(super) fn class(&self) -> Option<u8> {
        match self {
            Step::Hears(..) | Step::Arrives(_) | Step::Notices(_) => Some(NATURAL),
            Step::Works(_, _, Outcome::Done) => Some(NATURAL),
            // that is not a fault where nobody is there to attach to
            Step::Works(_, Work::Attach, Outcome::Failed) => Some(NATURAL),
            Step::NoticesPages(_) | Step::Asks | Step::QuestionArrives { .. } | Step::AnswerArrives => {
                Some(NATURAL)
            }
            Step::Recalls | Step::Decides(_) => Some(NATURAL),
            Step::Says(..) => Some(WITH_WORDS),
            Step::Works(..)
            | Step::Suspects(_)
            | Step::TooLate(_)
            | Step::Cancels(_)
            | Step::Crashes(_)
            | Step::Cut(_)
            | Step::CutPages
            | Step::Unanswered
            | Step::ArbiterFails(_)
            | Step::Forgets => None,
        }
    }

    /// It, in words.
    pub(super) fn tells(self, machines: &Machines) -> String {
        let kind = |message: MessageId| format!("{:?}", machines.message(message).kind());
        match self {
            Step::Hears(side, message) => format!("the {side} hears {}", kind(message)),
            Step::Arrives(Token::Attach) => "the page channel attaches".into(),
            Step::Arrives(Token::RoundEnd(round)) => format!("the pages of round {round} are all there"),
            Step::Works(side, Work::WriteCommit, Outcome::Failed) => {
                format!("the {side}'s write of Commit fails")
            }
            Step::Works(side, work, Outcome::Done) => format!("the {side} is done with {work:?}"),
            Step::Works(side, work, outcome) => format!("the {side}'s {work:?}: {outcome:?}"),
            Step::Notices(side) => format!("the {side} notices that its link is gone"),
            Step::Suspects(side) => format!("the {side} takes its link for lost"),
            Step::NoticesPages(side) => format!("the {side} notices that its page channel is gone"),
            Step::TooLate(side) => format!("the {side} has waited long enough"),
            Step::Cancels(side) => format!("the {side} is cancelled"),
            Step::Crashes(side) => format!("the {side} crashes"),
            Step::Cut(side) => format!("the link to the {side} is cut"),
            Step::CutPages => "the page channel is cut".into(),
            Step::Asks => "the source asks".into(),
            Step::Unanswered => "the source gets no answer".into(),
            Step::QuestionArrives { stray: false } => "the question arrives".into(),
            Step::QuestionArrives { stray: true } => "an old question arrives".into(),
            Step::AnswerArrives => "the source hears the answer".into(),
            Step::Recalls => "the source asks for the copy it left".into(),
            Step::Decides(side) => format!("the arbiter decides on the {side}'s claim"),
            Step::ArbiterFails(side) => format!("the {side} cannot hear the arbiter"),
            Step::Says(side, word) => format!("an operator says {word:?} to the {side}"),
            Step::Forgets => "the destination's listener forgets the session".into(),
        }
    }
}
