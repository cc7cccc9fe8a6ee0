"""Active learning: which case to label next, what is computed for it while nobody needs the server, and batches."""

from lib.activelearning.case_look import CaseLook
from lib.activelearning.casebook import Casebook
from lib.activelearning.offers import Offers, OfferStrategy
from lib.activelearning.prelabels import Prelabels
from lib.activelearning.scoring import AgreementScoring
from lib.activelearning.spare_time import SpareTime

__all__ = ["AgreementScoring", "CaseLook", "Casebook", "OfferStrategy", "Offers", "Prelabels", "SpareTime"]
